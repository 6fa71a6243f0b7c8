from an2 import *
for w in ws:
    L=best[w][1]; ref=L.get(1.0)
    if ref: print(f"{w:20s}", ' '.join(f"x{x:g} {100*(L[x]/ref-1):+.1f}" for x in sorted(L)))
