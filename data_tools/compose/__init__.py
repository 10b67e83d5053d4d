"""`laid-data compose`: haystacks from what people have."""
