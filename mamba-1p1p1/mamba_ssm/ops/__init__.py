"""Operators: the selective scan, and what the published mixers compute around it."""
