"""Files with pictures and clips in them: headers, decoding, encoding, settings inside, safe writing."""
