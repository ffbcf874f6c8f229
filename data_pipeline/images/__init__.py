"""Bytes to pictures: what they are before they are decoded, decoding by DALI, torchvision or PIL."""
