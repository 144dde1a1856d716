"""Models of the Hugging Face hub: their headers by ranges, their files by download, and what is said when that fails."""
