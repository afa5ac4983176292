"""Identity of requests: keys, tokens, addresses of clients, refused credentials."""
