"""How fast serving is, against its peers and against what the machine can do: `python -m serve.bench`."""
