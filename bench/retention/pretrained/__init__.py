"""A pretrained language model learns a domain that it does not know: what does it keep?"""
