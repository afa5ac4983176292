"""Files at the gateway: uploads streamed to storage, downloads, checks and expiry in the background."""
