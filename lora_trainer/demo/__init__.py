"""The embedded default: drawn pictures, a small SD1-layout base that learned them, and a scorer for them."""
