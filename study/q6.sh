export OMP_NUM_THREADS=1
while pgrep -f "q[45].sh" >/dev/null; do sleep 1; done
P="nice -n 5 ../.venv/bin/python e3.py"; C="nice -n 5 ../.venv/bin/python collect.py"
$C mixture_adam 0.125 0; $C residual,spiral 8 0; $C few_texts,diabetes 0.0625 0
$P spiral,patches,residual,factors,contrast,mixture_adam,diabetes,few_texts J,two .1,1 0
$C lstm,char_lm_b8,gpt_other 1,0.5,2 0
$P lstm,char_lm_b8,gpt_other J,two .1,1 0
$P tumours,diabetes,few_texts,snippets,digits_mlp H.35,H2,H4 .1,1 0
