"""What the tests share: oracles, ranks as threads and as processes, pages."""
