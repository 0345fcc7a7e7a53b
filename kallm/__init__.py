"""Replace the last feed-forward networks of a pretrained language model by KAN layers, and measure what it does."""
