"""Each headline figure as one command, against a plain implementation of the published method in the same run."""
