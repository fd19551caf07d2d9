"""What ``engine-loader doctor`` looks at. Every module yields findings; each was looked at, none is assumed."""
