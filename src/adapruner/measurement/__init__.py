"""One pass over the pool for Taylor and activation statistics, one over more text for second moments."""
