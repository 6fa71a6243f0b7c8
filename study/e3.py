from loop import *
C=dict(s=.75,N=2.5,rate=.5)
V('C0',**C)
for e in (.35,):
    V(f'CE{e}',ev=e,evstart=.15,**C)
V('C0.n',probe=False,**C)
V('C0.end',pend=.56,**C)
V('C0.k.85',kappa=.85,**C)
V('C0.k1.2',kappa=1.2,**C)
V('Cmed',form='med_flr',kappa=.93,**C)
V('Cabs',form='med_abs',kappa=1.25,power=.7,**C)
V('Cgm',form='gm_mix',**C)
from hdet.steer.posterior import Posterior
class Gm(Posterior):
    form='gm_mix'
class Md(Posterior):
    form='med_mix'
def WM(name,**k): W(name,cls=Md,**k)
def W(name,probe=True,cls=Posterior,**k): VERS[name]=S.Setting(controller=cls(**k),probe=probe)
WM('F.5',evidence=0.)
WM('F.35',evidence=0.,follow=.35)
WM('F.5e',evidence=.35)
WM('F.35e',follow=.35)
WM('F.5e.6',evidence=.6)
WM('F.5u',evidence=0.,until=.56)
from dataclasses import replace as _r
@dataclass(frozen=True, kw_only=True)
class Q2(Posterior):
    kappa: float = 0.0
    def update(self, b, o):
        c = o.share * 100; q = None
        if o.probe is not None and (sl := slopes_of(o.probe, o.multipliers, o.lag)) is not None:
            k = self.kappa / max(o.progress * 100, 1.) if self.kappa else self.noise_weight
            A, E = sl.debiased / c, sl.noise; q = (A - k * E) / (abs(A) + k * abs(E) + 1e-30); kept = self.smoothing ** c
            b = b._replace(progress=kept * b.progress + (1 - kept) * q, progress_size=1.0)
        return Posterior.update(self, b, o._replace(probe=None))
    def balance(self, b): return b.progress
W('Q.k5',cls=Q2,kappa=5.,evidence=.5)
W('Q.k10',cls=Q2,kappa=10.,evidence=.5)
W('Q.2',cls=Q2,noise_weight=.2,evidence=.5)
W('J')
W('PP.np',probe=False)
W('Ev',until=0.,evidence=2.)
W('PP.cosine')
@dataclass(frozen=True, kw_only=True)
class H(Posterior):
    heldout: bool = True
W('H.35',cls=H)
W('H2',cls=H,evidence=2.)
W('H4',cls=H,evidence=4.)
VERS['PP.400']=S.Setting(controller=Posterior(),rounds=400)
VERS['PP.25r']=S.Setting(controller=Posterior(),rounds=25)
@dataclass(frozen=True, kw_only=True)
class K(Posterior):
    kappa: float = 1.0
    def update(self, b, o): return Posterior.update(self, b, o._replace(movement=o.movement / self.kappa))
@dataclass(frozen=True, kw_only=True)
class U(Posterior):
    u: float = .5
    tau: float = .7
    def update(self, b, o):
        b2, q = Posterior.update(self, b, o)
        if not o.progress <= o.until: return b2, q
        shrink = b2.centre * self.u / (1 + (b2.centre / self.tau) ** 2)
        # the movement seen next is that of the gain in force: compare with the shrunk one
        return b2._replace(gain=b2.gain * math.exp(-shrink)), q
W('U',cls=U)
W('PP'); W('PP.6',evidence=.6);  W('PP.7',evidence=.7); W('PP.15',evidence=.15); W('PP.np',probe=False)
W('G.k1.2',cls=K,kappa=1.2,evidence=0.); W('PP.k.7',cls=K,kappa=.7); W('PP.k1.4',cls=K,kappa=1.4)
W('PP.f.25',follow=.25); W('PP.f1',follow=1.); W('PP.u.2',until=.2); W('PP.u.8',until=.8); W('PP.s.64',smoothing=.64); W('PP.s.89',smoothing=.89); W('PP.n.1',noise_weight=.1); W('PP.n.4',noise_weight=.4); W('PP.e.7',evidence=.7)
W('G',evidence=0.)
W('Ge')
W('Ge.6',evidence=.6)
W('Ge1',evidence=1.)
W('Gk1.6',evidence=.6,noise_weight=.1)
W('Gk05.6',evidence=.6,noise_weight=.05)
W('Fgm',cls=Gm,evidence=0.)
tr=[w for w in CHEAP if half(w)=='train']; te=[w for w in CHEAP if half(w)=='test']
lm=['fine_tune','vision_transformer','char_lm','gpt']
g=dict(trc=tr,tec=te,lm=lm,te2=['masked_lm','gru'])
which,vs,xs,seeds=sys.argv[1:5]
ws=[w for q in which.split(',') for w in g.get(q,[q])]
for s in seeds.split(','):
    print('seed',s); table(ws,[float(eval(x)) for x in xs.split(',')],[int(s)],{v:VERS[v] for v in vs.split(',')})
