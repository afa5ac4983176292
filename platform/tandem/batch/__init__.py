"""Answers to a file of rows: read by Ray Data, answered by engines that never idle, published piece by piece."""
