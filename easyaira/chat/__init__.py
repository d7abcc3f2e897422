"""The chat page: candidates, their scores, the choice, and a search of the data."""
