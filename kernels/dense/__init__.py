"""The vendor's dense product."""
