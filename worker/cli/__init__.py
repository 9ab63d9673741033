"""Commands for people: render one video, look after the weights."""
