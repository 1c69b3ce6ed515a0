"""Hugging Face folders: reading, writing and exporting them."""
