"""Commands of a cluster: prepare data, pretrain, and what comes after. `python -m jobs.<verb> --help`."""
