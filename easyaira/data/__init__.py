"""From rows of a file to rows of tokens: sources, templates, examples, batches."""
