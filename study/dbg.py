from loop import *
from hdet.steer.posterior import Posterior
for w,x in (('friedman',1.),('autoencoder',1.),('char_lm',1.)) if len(sys.argv)<2 else ((sys.argv[1],1.),):
    W=wl(w); o=S.simulate(W,W.tuned*x,0,S.Setting(controller=Posterior(evidence=.01),keep_slopes=True))
    print(w,o.loss,'gains',o.details['gains'][3:60:6])
    print('  ',[f"p{p:.2f} A/E {s.debiased/s.noise if s.noise else 0:.2f} q {(s.debiased-.1*s.noise)/(abs(s.debiased)+.1*abs(s.noise)):.2f} R/A {s.raw/abs(s.debiased):.1f}" for p,s in o.details['slopes'][3:60:5]])
