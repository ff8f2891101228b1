"""Rules of homogeneity: the degree of an operation's result, given those of its inputs."""
