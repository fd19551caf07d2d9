"""Devices: whose memory can be read into beside the CPU's."""
