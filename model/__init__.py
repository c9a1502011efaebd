"""Models that keep their past in a kvstore."""
