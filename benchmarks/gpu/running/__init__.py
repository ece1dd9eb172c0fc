"""How a GPU run goes on: stages in order, their processes, their journals, the files that it shows."""
