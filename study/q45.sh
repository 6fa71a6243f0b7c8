while pgrep -f "q4.sh" >/dev/null; do sleep 1; done
bash q5.sh
