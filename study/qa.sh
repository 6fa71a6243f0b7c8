export OMP_NUM_THREADS=1
P="nice -n 5 ../.venv/bin/python e3.py"; C="nice -n 5 ../.venv/bin/python collect.py"
$P digits_mlp,digits_conv,regression,recommender,batch_norm,mixture PF .1,1 0
$P fine_tune,vision_transformer,gru,masked_lm,char_lm,gpt PF 1,.1 0
$C mixture_adam 0.125 0; $C residual,spiral 8 0; $C few_texts,diabetes 0.0625 0
$P spiral,patches,residual,factors,contrast,mixture_adam,diabetes,few_texts,tumours,dropout PF,two,G .1,1 0
$C gpt*2 1,0.5 0
$P gpt*2 PF .2,1 0
$C lstm,char_lm_b8,gpt_other 1,0.5 0
$P lstm,char_lm_b8,gpt_other PF,two 1,.1 0
