"""What a cluster is and has: storage, folders with a manifest, sessions. Imports none of the other packages."""
