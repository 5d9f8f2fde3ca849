"""What dense prediction shares: the backbone's maps, adapters, data sets, metrics, published weights, pictures."""
