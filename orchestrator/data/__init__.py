"""Where tokens come from: text, corpora, the Hub and S3, as the exact files that a node needs."""
