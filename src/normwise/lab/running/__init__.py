"""Running recipes: cells, each in a folder of its own, that survive being killed."""
