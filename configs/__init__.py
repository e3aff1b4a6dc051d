"""Hydra configuration groups: data only. This file exists because Hydra looks groups up in a regular package."""
