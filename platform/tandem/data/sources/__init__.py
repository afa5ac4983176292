"""Sources of text: corpora, files of records, and the samples they hold."""
