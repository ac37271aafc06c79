"""Problems -> tokens, stored once, memory-mapped; a training method is a view of them."""
