"""The operators, one file each: schema, fake, gradient, function and reference."""
