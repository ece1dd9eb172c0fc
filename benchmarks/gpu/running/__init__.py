"""How a GPU run proceeds: its stages in order, their processes, their journals, the published files."""
