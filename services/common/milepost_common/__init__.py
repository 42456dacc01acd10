"""What services share: settings, process, server. No domain logic."""
