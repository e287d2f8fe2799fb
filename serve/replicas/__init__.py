"""The endpoint on Ray Serve: gateways without weights, replicas with one engine each, and the way between them."""
