"""The activation store: the contract between harvesting, training and analysis."""
