"""The `kvstore` command. The only room that imports both the store and the models on it."""
