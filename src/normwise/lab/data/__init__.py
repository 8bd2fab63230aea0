"""Readers of data sets in the formats that their makers publish; nothing is believed unchecked."""
