"""Devices that exchange logits beside devices that exchange parameters: accuracy of each user's model against bytes."""
