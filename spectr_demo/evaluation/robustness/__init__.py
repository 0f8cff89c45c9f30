"""When routing stops working: experts that are weak, alike, many, or trained again."""
