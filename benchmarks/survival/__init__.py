"""The service under hostile conditions, held against bars: overload, leaving clients, signals, kills, hours, quotas."""
