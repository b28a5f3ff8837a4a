"""Prompts: reading them from files, rendering them, and the order that training takes them in."""
