"""study=logit_lens"""
