"""The demo model: a drawn portrait, synthetic speech, and the program that trains a small lip-sync model on them."""
