"""Studies in object storage: worked on in a local copy, kept at a URI."""
