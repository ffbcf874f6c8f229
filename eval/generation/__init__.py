"""How good drawn pictures are: layouts for judges, distances between folders, agreement with prompts."""
