"""The graph diff: two graphs side by side, what of one stands for what of the other, as data, page, drawing and text."""
