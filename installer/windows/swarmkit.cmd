@echo off
rem swarmkit's launcher for Windows: makes the tray's Python environment at the first start and after an upgrade, and
rem runs swarmkit there. Without arguments, that is the tray. Untested on Windows.
setlocal
set "here=%~dp0"
set /p id=<"%here%id.txt"
set "data=%LOCALAPPDATA%\swarmkit\swarmkit"
set "environment=%data%\envs\%id%"
set "UV_PYTHON_INSTALL_DIR=%data%\envs\python"
set "SWARMKIT_LAUNCHER=%~f0"

if "%~1"=="--end" goto end
if exist "%environment%\complete" goto run
if "%~1"=="uninstall" exit /b 0
echo swarmkit: making the tray's Python environment in %environment% ...
if exist "%environment%" rmdir /s /q "%environment%"
"%here%uv.exe" venv --python ">=3.10" "%environment%" || goto failed
"%here%uv.exe" pip install --python "%environment%\Scripts\python.exe" -r "%here%tray-requirements.txt" || goto failed
for %%w in ("%here%swarmkit_llm-*.whl") do "%here%uv.exe" pip install --no-deps --python "%environment%\Scripts\python.exe" "%%w" || goto failed
echo.>"%environment%\complete"

:run
if "%~1"=="" goto tray
if "%~1"=="tray" goto tray
"%environment%\Scripts\python.exe" -m swarmkit.cli %*
exit /b %ERRORLEVEL%

:tray
start "" "%environment%\Scripts\pythonw.exe" -m swarmkit.cli tray
exit /b 0

:end
if not exist "%environment%\complete" exit /b 0
"%environment%\Scripts\python.exe" -m swarmkit.cli uninstall --yes --keep settings,identity,weights,history
exit /b %ERRORLEVEL%

:failed
echo swarmkit: the environment could not be made. Look at the messages above, and start swarmkit again.
if exist "%environment%" rmdir /s /q "%environment%"
pause
exit /b 1
